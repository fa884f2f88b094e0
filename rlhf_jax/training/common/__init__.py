"""What all stages share while they run: the open stage, its loop, its model, its memory."""

"""Asking a trained model from the command line: files of answers, a conversation, preferences."""

"""An OpenAI-compatible server of models, and its page."""

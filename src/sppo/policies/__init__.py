"""Language models as policies: finding and loading models, chats, prompts and generation."""

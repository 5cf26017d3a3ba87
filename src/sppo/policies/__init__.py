"""Language models as policies: finding and loading them, chats, prompts, generation."""

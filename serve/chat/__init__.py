"""Conversations: what a chat talks to, the terminal chat and the API client."""

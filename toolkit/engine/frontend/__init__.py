"""The OpenAI-compatible server in front of one worker's ranks. Reading order: server, generate, choices, ranks."""

"""The load generator: an asyncio client that sweeps load points over any OpenAI-compatible server.

Reading order: ``options`` (what can be asked), ``sweep`` (points and files), ``arrival`` (when requests are sent),
``client`` (one request; every timestamp), ``openai_api`` and ``sse`` (what is said over HTTP).
"""

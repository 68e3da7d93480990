"""An HTTP server over the scheduler, with the protocols of OpenAI and Anthropic."""

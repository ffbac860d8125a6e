"""OpenAI's protocol without HTTP: bodies in, answers out. Shared by the server and batch jobs."""

"""The HTTP API and the web pages. `uvicorn api_stub.app:app` serves them."""

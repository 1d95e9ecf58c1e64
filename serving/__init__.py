"""What answers: opened exports, combine lookup, the FastAPI app on Ray Serve, the HTTP client."""

"""One folder an operation: api, reference, one file a backend, benchmark."""

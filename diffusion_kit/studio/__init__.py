"""The studio: web pages and an HTTP interface over one queue and one loaded model."""

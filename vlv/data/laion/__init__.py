"""Which images of a large list of URLs are to be downloaded, decided from its metadata."""

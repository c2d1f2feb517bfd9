"""The web demo of a run: what it draws, what a run has to tell, the page, and the server."""

"""What stands between a loaded model and many users: a server and a page."""

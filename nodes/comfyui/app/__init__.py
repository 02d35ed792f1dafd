"""What the pack's pages in the browser ask the server for: training runs, the people trained, and dropped photos."""

"""What travels to the Hub as remote code: this folder is the closed set, flat, and imports nothing else of ours."""

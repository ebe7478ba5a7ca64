"""What was known before a search: diffusers' schedulers and classical tables, and their race."""

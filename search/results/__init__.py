"""What a search leaves behind: solver, report, pictures, model card, upload."""

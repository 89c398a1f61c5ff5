"""What is measured, and against what. See README.md here."""

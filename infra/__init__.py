"""What bdnet runs on."""

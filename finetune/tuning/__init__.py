"""What trains, how it is saved and how the saved result is verified."""

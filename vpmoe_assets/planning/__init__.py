"""What a run would do before it does anything: what is reused, what is built, what that takes."""

"""What an answer is worth: metrics, statistics over cases, figures."""

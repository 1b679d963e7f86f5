"""Tables and reports: models judged on the same text."""

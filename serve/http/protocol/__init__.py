"""What requests may say: one strict model per endpoint."""

"""Images, videos and audio: geometry, decoding, pixels."""

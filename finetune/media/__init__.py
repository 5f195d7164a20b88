"""Images, videos and audio: decoding, resizing, slicing and frame sampling."""

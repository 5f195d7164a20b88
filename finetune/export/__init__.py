"""From what training leaves to folders that others load: merged, split for servers, gathered from ZeRO's parts."""

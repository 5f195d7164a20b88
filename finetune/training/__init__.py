"""What trains: LoRA and frozen parts, callbacks that watch a run, throughput."""

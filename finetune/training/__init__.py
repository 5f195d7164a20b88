"""LoRA and freezing, optimizer groups, callbacks that stop or watch a run, throughput and FLOPs."""

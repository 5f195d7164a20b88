"""Where flags come from: the command line, a YAML file, LLaMA-Factory's names for them."""

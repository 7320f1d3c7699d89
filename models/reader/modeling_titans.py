from titans.hf import TitansForCausalLM, TitansHFConfig, TitansHFModel  # noqa: F401  for trust_remote_code=True

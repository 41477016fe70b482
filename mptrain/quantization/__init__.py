"""Post-training quantization by torchao: methods, evaluation, quantization-aware fine-tuning, deployment matrix."""

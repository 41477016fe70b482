"""Post-training quantization of our and Hugging Face's models with torchao: quantize, verify, save."""

from mptrain.quantization.apply import load_quantized, quantize_model
from mptrain.quantization.artifact import load, save
from mptrain.quantization.report import Layer, Report
from mptrain.quantization.source import Source, open_source

__all__ = ["Layer", "Report", "Source", "load", "load_quantized", "open_source", "quantize_model", "save"]

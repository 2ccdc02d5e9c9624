"""The architecture: Megatron's embedding, linears and layers, with this project's modules in their slots."""

import logging
import warnings

# Known, decided, and repeated at every start: Apex and Transformer Engine are not used, and GPTModel, which
# Megatron is retiring in favour of a model driven by a pattern string, is what this architecture's layer
# specs fit.
warnings.filterwarnings("ignore", message="Apex is not installed")
warnings.filterwarnings("ignore", message="full scope is deprecated")
logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
    lambda record: "GPTModel IS DEPRECATED" not in record.getMessage()
)

"""The words that flags and checks know. Nothing is imported here, so that help answers at once."""

# The modes in which mlx-lm quantizes.
QUANTIZATION_MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
# The bits and group sizes that mx.quantize takes in the mode affine.
Q_BITS = (2, 3, 4, 5, 6, 8)
Q_GROUP_SIZES = (32, 64, 128)
# mlx-lm's mixed-bit recipes.
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
# The types that mlx-lm converts to.
DTYPES = ("float16", "bfloat16", "float32")

# The layouts that the converter reads.
LAYOUTS = ("split", "module", "manifest", "dense")

# What scores channels: a trained predictor, the prompt's activations, stored scores, or these two.
SELECTORS = ("predictor", "activations", "static", "glass")
# What of the activations counts; mlx_ifp/dense_pass/statistics.py defines each.
STATISTICS = ("griffin", "norm", "probe")

# Who reads the prompt: the whole model, or the sub-network that answers.
PREFILLS = ("dense", "pruned")

STAGES = ("pretrain", "sft")
FINE_TUNE_TYPES = ("full", "layers", "ffn", "lora", "predictor")

# What selects for a prompt that is evaluated.
WAYS = ("prompt", "task", "static", "dense")

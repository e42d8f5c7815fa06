"""What the description of a Keras model may name. Anything else would be code that is not Keras' own, or runs some.

Keras' `safe_mode` refuses lambdas, but its class names have led to other code before: `TorchModuleWrapper` reads a
pickle (CVE-2025-49655), `Lambda` in an `.h5` was run (CVE-2025-9905), a module of any name was imported
(CVE-2025-1550), lookups read files of any path (CVE-2025-12058). So this is a list of what is taken.
"""

from __future__ import annotations

from typing import Final


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LAYERS: Final = _words(
    """
    Activation ActivityRegularization AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveMaxPooling1D
    AdaptiveMaxPooling2D Add AdditiveAttention AlphaDropout Attention Average AveragePooling1D AveragePooling2D
    AveragePooling3D AvgPool1D AvgPool2D AvgPool3D BatchNormalization Bidirectional CategoryEncoding CenterCrop
    Concatenate Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D Conv3DTranspose Convolution1D
    Convolution2D Convolution2DTranspose Convolution3D Cropping1D Cropping2D Cropping3D Dense DepthwiseConv1D
    DepthwiseConv2D Dot Dropout ELU EinsumDense Embedding Flatten GELU GRU GRUCell GaussianDropout GaussianNoise
    GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D GlobalAvgPool1D GlobalAvgPool2D
    GlobalAvgPool3D GlobalMaxPool1D GlobalMaxPool2D GlobalMaxPool3D GlobalMaxPooling1D GlobalMaxPooling2D
    GlobalMaxPooling3D GroupNormalization GroupQueryAttention Identity InputLayer LSTM LSTMCell LayerNormalization
    LeakyReLU Masking MaxPool1D MaxPool2D MaxPool3D MaxPooling1D MaxPooling2D MaxPooling3D Maximum Minimum
    MultiHeadAttention Multiply Normalization PReLU Permute RMSNormalization RNN RandomBrightness RandomContrast
    RandomCrop RandomFlip RandomHeight RandomHue RandomInvert RandomRotation RandomSaturation RandomSharpness
    RandomTranslation RandomWidth RandomZoom ReLU RepeatVector Rescaling Reshape Resizing ReversibleEmbedding
    SeparableConv1D SeparableConv2D SeparableConvolution1D SeparableConvolution2D SimpleRNN SimpleRNNCell Softmax
    SpatialDropout1D SpatialDropout2D SpatialDropout3D SpectralNormalization StackedRNNCells Subtract ThresholdedReLU
    TimeDistributed UnitNormalization UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D
    """
)
MODELS: Final = frozenset({"Functional", "Model", "Sequential"})
"""`Model` is what Keras 2 calls a functional one."""
PARTS: Final = _words(
    """
    Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity IdentityInitializer LecunNormal
    LecunUniform Ones Orthogonal OrthogonalInitializer RandomNormal RandomUniform TruncatedNormal VarianceScaling Zeros
    L1 L1L2 L2 OrthogonalRegularizer MaxNorm MinMaxNorm NonNeg UnitNorm
    DTypePolicy FloatDTypePolicy DTypePolicyMap Policy SeedGenerator TensorShape
    """
)
"""Initialisers, regularisers, constraints, precisions."""
VALUES: Final = frozenset(
    {"__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__", "__tuple__"}
)
ACTIVATIONS: Final = _words(
    """
    celu elu exponential gelu glu hard_shrink hard_sigmoid hard_silu hard_swish hard_tanh leaky_relu linear log_sigmoid
    log_softmax mish relu relu6 selu sigmoid silu soft_shrink softmax softplus softsign sparse_plus sparse_sigmoid
    sparsemax squareplus swish tanh tanh_shrink threshold
    """
)
OPERATIONS: Final = frozenset({"keras.src.ops.math", "keras.src.ops.nn", "keras.src.ops.numpy"})
"""The modules of operations that are used as layers: `x * 2` in a functional model is `Multiply` of the last."""
CORE_OPERATIONS: Final = frozenset({"Cast", "Slice"})
MODULES: Final = frozenset(
    {
        *("keras", "keras.layers", "keras.models", "keras.initializers", "keras.regularizers", "keras.constraints"),
        *("keras.activations", "keras.dtype_policies", "keras.mixed_precision", "keras.random", "builtins"),
        *("keras.src.models.functional", "keras.src.models.sequential", "keras.src.models.model"),
        *("keras.src.engine.functional", "keras.src.engine.sequential", "keras.src.random.seed_generator"),
    }
)

WHY: Final = {
    "Lambda": "it is code, and code in a file is not run",
    "__lambda__": "it is code, and code in a file is not run",
    "TFOpLambda": "it is an operation of TensorFlow",
    "SlicingOpLambda": "it is an operation of TensorFlow",
    "TFSMLayer": "it reads a SavedModel from elsewhere",
    "TorchModuleWrapper": "it is read from a pickle, and reading one runs code",
    "JaxLayer": "it is code, and code in a file is not run",
    "FlaxLayer": "it is code, and code in a file is not run",
    **dict.fromkeys(
        ("StringLookup", "IntegerLookup", "TextVectorization", "Hashing", "HashedCrossing", "Discretization"),
        "it works on texts or in a lookup table, which an ONNX graph of numbers does not have",
    ),
}
"""Of layers that people use."""

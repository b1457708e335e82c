"""Integer-only Vision Transformers through Apache TVM: a trained ViT in, one proved ``.so`` out.

The public API is four functions, imported when first used, so that ``import tvm`` (which loads the
plug-in of this package) stays light::

    mod = tvm_vitq.load_model("deit_tiny_patch16_224", checkpoint="W.safetensors")
    qdq = tvm_vitq.quantize(mod, "calibration_images/")
    artifact = tvm_vitq.compile(qdq, output="deit_tiny.so")
    logits = tvm_vitq.load("deit_tiny.so").run(x)
"""

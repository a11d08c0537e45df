"""Forward engines: what computes a frozen network, each behind the same small interface.

    engine.py         what an engine is given, and what it gives
    eager.py          torch as it is: no build, no start-up; always there
    inductor.py       torch's compiler: ahead of time on CPUs, with CUDA graphs on GPUs
    onnx_runtime.py   ONNX Runtime, float32, CPUs; extra "onnx"
    openvino.py       OpenVINO, float32 and bf16, CPUs; extra "openvino"
    choose.py         which of them pays for a job, and whether its features can be trusted
    artefacts.py      what engines build, kept between runs
    memo.py           what was measured before

Importing this package imports none of them.
"""

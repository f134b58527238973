"""ControlNet export for ``optimum-cli export onnx``: icexport's graphs as parts of a diffusers export by optimum.

Install ``icexport[optimum]`` in an environment of its own (optimum-onnx 0.1 needs older versions of transformers and
diffusers than the rest of icexport is tested with), and switch the extension on once per environment::

    python -m icexport.optimum register
    optimum-cli export onnx --model BASE --task text-to-image --model-kwargs \
        '{"condition": "canny", "controlnet": "FOLDER_OR_HUB_ID", "probe": "none"}' OUT

``BASE`` is a diffusers pipeline of Stable Diffusion 1 or 2, a folder or a Hub id; a folder of
``StableDiffusionControlNetPipeline`` will do, with its ``controlnet`` subfolder as ``"controlnet"``. Condition,
ControlNet and probe mean what ``icexport build --cond --controlnet --probe`` mean, and defaults and refusals are the
same. From Python, ``icexport.optimum.export.controlled`` does it around optimum's ``main_export``.

What one gets, beside optimum's own text encoder, VAE encoder, VAE decoder, tokenizer and scheduler:

* ``controlnet/model.onnx`` with ``residual_scale``;
* ``unet/model.onnx`` that takes the residuals and gives the taps and the time embedding, in the place of optimum's;
* ``probe/model.onnx``, unless the probe is ``"none"``;

with the inputs and outputs of ARCHITECTURE.md, batch, height and width free, and a ``config.json`` each. The
``model_index.json`` names the pipeline that can run it, which is ours::

    from icexport.optimum.pipeline import ORTStableDiffusionControlNetPipeline
    pipe = ORTStableDiffusionControlNetPipeline.from_pretrained("OUT")
    pipe("a red apple", image=edges).images[0]

optimum checks each file against PyTorch, and its options (``--opset``, ``--dtype``, ``--atol``, ``--no-dynamic-axes``
...) hold for these parts as for its own. ``--dtype fp16`` needs ``--atol 0.1`` or so, because optimum's tolerances are
those of float32 and optimum-onnx 0.1.0 stops when more than three parts miss them. Commands without ``"condition"``
are optimum's, unchanged.

What does not work: a ControlNet without a base model (the UNet's graph must take its residuals); running the result
with a pipeline of optimum's own, none of which has a ControlNet (it says that it does not know this one); several
ControlNets at once; SDXL and SD 3; a text encoder or tokenizer saved by transformers 5, which transformers 4 cannot
read (refused, because the text encoder would be exported with random weights). The parts are traced by TorchScript,
which is what optimum uses. Parity gate, fidelity, engines and cache are ``icexport build``'s alone.

How it hooks in: optimum-cli imports the files in its namespace folder ``optimum/commands/register``, a place for
further commands. ``register`` writes one there, because a wheel that brought it along would make ``import optimum``
succeed, and diffusers and transformers report optimum as installed, in every environment that has icexport. optimum
has a registry for model types but none for the parts of a pipeline: that list is a function, which is replaced while
such an export runs.
"""

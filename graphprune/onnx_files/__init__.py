"""ONNX in and out: files that become modules, modules that become files, and cuts in the files themselves."""

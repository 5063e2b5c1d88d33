"""The ctypes bindings of the native library."""

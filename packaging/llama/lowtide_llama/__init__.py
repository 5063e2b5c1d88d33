"""llama.cpp's shared libraries, in the folder `lib`; lowtide finds and loads them."""

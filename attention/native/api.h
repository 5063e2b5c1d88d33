#pragma once

// What Python sees of the library: plain C, visible by name.
#define LOWTIDE_API extern "C" __attribute__((visibility("default")))

#!/usr/bin/env bash
# Bring what `make test-gpu` needs where there is no GPU: Mesa's software Vulkan driver (lavapipe) from Debian's packages,
# and a llama.cpp with Vulkan from npm into build/vulkan. Says what it could not bring, and ends with 1 then.
set -uo pipefail
cd "$(dirname "$0")/../.."
folder=build/vulkan
# The same llama.cpp as that of the llama-cpp-python whose structs lowtide declares.
package=@node-llama-cpp/linux-x64-vulkan@3.22.1

missing() {
    echo "No software Vulkan device: $1. The tests on a device are skipped." >&2
    exit 1
}

[ "$(uname -sm)" = "Linux x86_64" ] || missing "the library is for Linux on x86-64, and this is $(uname -sm)"
if ! ls /usr/share/vulkan/icd.d/lvp_icd*.json >/dev/null 2>&1; then
    command -v apt-get >/dev/null || missing "there is no Vulkan driver, and no apt-get to install mesa-vulkan-drivers with"
    [ "$(id -u)" = 0 ] || missing "there is no Vulkan driver; as root: apt-get install mesa-vulkan-drivers libvulkan1"
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends mesa-vulkan-drivers libvulkan1; } >/dev/null 2>&1 ||
        missing "apt-get could not install mesa-vulkan-drivers and libvulkan1"
fi
if [ ! -e "$folder/libllama.so" ]; then
    command -v npm >/dev/null || missing "there is no npm to fetch $package with"
    rm -rf "$folder.new" && mkdir -p "$folder.new"
    archive=$(cd "$folder.new" && npm pack --silent "$package") || missing "npm could not fetch $package"
    tar -xzf "$folder.new/$archive" -C "$folder.new" --strip-components=3 --wildcards 'package/bins/*/lib*.so' ||
        missing "$package does not have the files that it had"
    rm -f "$folder.new/$archive" "$folder.new/libggml-cpu-sapphirerapids.so" "$folder.new/libllama-common.so"
    ln -s libllama.vulkan.v0.5.0.so "$folder.new/libllama.so"
    rm -rf "$folder" && mv "$folder.new" "$folder"
fi
echo "A software Vulkan device for make test-gpu: lavapipe, $folder"

"""What the commands share: options, input, output, the streams, and --enforce."""

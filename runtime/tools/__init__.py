"""Tools: functions that a model may call, the grammar of its calls, and the calls in what it wrote."""

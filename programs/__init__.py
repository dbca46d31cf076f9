"""Controller scripts: run them with ``python -m danaus.programs.NAME``, or copy one and change it."""

"""What every pass needs: its contract, the pipeline that runs it, values, lazy weights, inputs and outputs."""

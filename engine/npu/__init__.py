"""What only an NPU needs: its graph backends, its limits, lowering without hardware, and the doctor."""

/* The part of ONNX Runtime's C API that a custom operator library needs. No package brings the official header, so this
 * file has the function indices of the OrtApi vtable. They never change, because functions are only appended;
 * tests/runtime/test_kernels_abi.py calls each of them. */
#ifndef SATCHEL_ABI_H
#define SATCHEL_ABI_H

#include <stddef.h>
#include <stdint.h>

enum { ORT_API_VERSION = 20 }; /* 18 is the first with all functions below */

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorInfo OrtTensorInfo;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;

typedef struct {
    void *functions[415];
} OrtApi;

typedef struct {
    const OrtApi *(*get_api)(uint32_t version);
    const char *(*get_version)(void);
} OrtApiBase;

/* ORT_ANY: an operator's own code reads the type. */
typedef enum { ORT_ANY = 0, ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_INT32 = 6, ORT_INT64 = 7, ORT_FLOAT16 = 10 } OrtElementType;
typedef enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 } OrtCharacteristic;
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };

typedef struct OrtCustomOp {
    uint32_t version;
    void *(*create_kernel)(const struct OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
    const char *(*get_name)(const struct OrtCustomOp *);
    const char *(*get_provider)(const struct OrtCustomOp *);
    OrtElementType (*get_input_type)(const struct OrtCustomOp *, size_t);
    size_t (*get_input_count)(const struct OrtCustomOp *);
    OrtElementType (*get_output_type)(const struct OrtCustomOp *, size_t);
    size_t (*get_output_count)(const struct OrtCustomOp *);
    void (*compute)(void *, OrtKernelContext *);
    void (*destroy)(void *);
    OrtCharacteristic (*get_input_characteristic)(const struct OrtCustomOp *, size_t);
    OrtCharacteristic (*get_output_characteristic)(const struct OrtCustomOp *, size_t);
    int (*get_input_memory)(const struct OrtCustomOp *, size_t);
    int (*variadic[4])(const struct OrtCustomOp *);
    OrtStatus *(*create_kernel_checked)(const struct OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
    OrtStatus *(*compute_checked)(void *, OrtKernelContext *);
    OrtStatus *(*infer_shapes)(const struct OrtCustomOp *, void *);
    int (*get_start_version)(const struct OrtCustomOp *);
    int (*get_end_version)(const struct OrtCustomOp *);
    size_t (*get_in_place)(int **, int **);
    void (*release_in_place)(int *, int *);
    size_t (*get_aliases)(int **, int **);
    void (*release_aliases)(int *, int *);
} OrtCustomOp;

/* ORT(api, name)(arguments) calls a function by the index and type below. */
#define ORT(api, name) ((ORT_##name##_TYPE)(api)->functions[ORT_##name##_INDEX])

#define ORT_FUNCTION(name, index, result, ...) \
    enum { ORT_##name##_INDEX = index };       \
    typedef result (*ORT_##name##_TYPE)(__VA_ARGS__)

ORT_FUNCTION(CreateStatus, 0, OrtStatus *, int code, const char *message);
ORT_FUNCTION(CreateCustomOpDomain, 26, OrtStatus *, const char *name, OrtCustomOpDomain **);
ORT_FUNCTION(CustomOpDomain_Add, 27, OrtStatus *, OrtCustomOpDomain *, const OrtCustomOp *);
ORT_FUNCTION(AddCustomOpDomain, 28, OrtStatus *, OrtSessionOptions *, OrtCustomOpDomain *);
ORT_FUNCTION(GetTensorMutableData, 51, OrtStatus *, OrtValue *, void **);
ORT_FUNCTION(GetTensorElementType, 60, OrtStatus *, const OrtTensorInfo *, OrtElementType *);
ORT_FUNCTION(GetDimensionsCount, 61, OrtStatus *, const OrtTensorInfo *, size_t *);
ORT_FUNCTION(GetDimensions, 62, OrtStatus *, const OrtTensorInfo *, int64_t *, size_t);
ORT_FUNCTION(GetTensorTypeAndShape, 65, OrtStatus *, const OrtValue *, OrtTensorInfo **);
ORT_FUNCTION(KernelInfoGetAttribute_float, 85, OrtStatus *, const OrtKernelInfo *, const char *, float *);
ORT_FUNCTION(KernelInfoGetAttribute_int64, 86, OrtStatus *, const OrtKernelInfo *, const char *, int64_t *);
ORT_FUNCTION(KernelInfoGetAttribute_string, 87, OrtStatus *, const OrtKernelInfo *, const char *, char *, size_t *);
ORT_FUNCTION(KernelContext_GetInputCount, 88, OrtStatus *, const OrtKernelContext *, size_t *);
ORT_FUNCTION(KernelContext_GetInput, 90, OrtStatus *, const OrtKernelContext *, size_t, const OrtValue **);
ORT_FUNCTION(KernelContext_GetOutput, 91, OrtStatus *, OrtKernelContext *, size_t, const int64_t *, size_t,
             OrtValue **);
ORT_FUNCTION(ReleaseStatus, 93, void, OrtStatus *);
ORT_FUNCTION(ReleaseTensorTypeAndShapeInfo, 99, void, OrtTensorInfo *);
ORT_FUNCTION(GetSessionConfigEntry, 238, OrtStatus *, const OrtSessionOptions *, const char *, char *, size_t *);
ORT_FUNCTION(KernelInfoGetConstantInput_tensor, 249, OrtStatus *, const OrtKernelInfo *, size_t, int *, const OrtValue **);
ORT_FUNCTION(KernelContext_ParallelFor, 274, OrtStatus *, const OrtKernelContext *, void (*)(void *, size_t), size_t,
             size_t, void *);
/* Since ONNX Runtime 1.24: it allocates nothing, and the dimensions are the tensor's own. */
ORT_FUNCTION(GetTensorElementTypeAndShapeDataReference, 414, OrtStatus *, const OrtValue *, OrtElementType *,
             const int64_t **, size_t *);

#endif

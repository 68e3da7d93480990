/* Registers satchel's custom operators with an ONNX Runtime session (docs/kernels.md). */
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "helpers.h"
#include "instruction_set.h"
#include "operator.h"
#include "trial.h"

static const Operator *operator_of(const OrtCustomOp *op) { return (const Operator *)op; }

typedef struct {
    const OrtApi *api;
    const Operator *operator;
    void *own;
} Kernel;

static OrtStatus *make_error(const OrtApi *api, const char *error)
{
    return ORT(api, CreateStatus)(ORT_INVALID_ARGUMENT, error ? error : "satchel: an operator failed");
}

static const char *get_name(const OrtCustomOp *op) { return operator_of(op)->name; }
static const char *get_provider(const OrtCustomOp *op) { return (void)op, "CPUExecutionProvider"; }
static size_t get_input_count(const OrtCustomOp *op) { return operator_of(op)->inputs; }
static size_t get_output_count(const OrtCustomOp *op) { return operator_of(op)->outputs; }
static OrtElementType get_input_type(const OrtCustomOp *op, size_t i) { return operator_of(op)->input_types[i]; }
static OrtElementType get_output_type(const OrtCustomOp *op, size_t i)
{
    return operator_of(op)->output_types == NULL ? ORT_FLOAT : operator_of(op)->output_types[i];
}
static int get_input_memory(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int get_start_version(const OrtCustomOp *op) { return (void)op, 1; }
static int get_end_version(const OrtCustomOp *op) { return (void)op, INT_MAX; }

static OrtCharacteristic get_input_characteristic(const OrtCustomOp *op, size_t i)
{
    return i < operator_of(op)->required ? ORT_REQUIRED : ORT_OPTIONAL;
}

static OrtCharacteristic get_output_characteristic(const OrtCustomOp *op, size_t i)
{
    return i < operator_of(op)->outputs - operator_of(op)->optional_outputs ? ORT_REQUIRED : ORT_OPTIONAL;
}

static OrtStatus *create_kernel(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **made)
{
    Kernel *kernel = malloc(sizeof *kernel);
    Create create = {api, info, NULL};
    if (kernel == NULL)
        return make_error(api, "satchel: out of memory");
    *kernel = (Kernel){api, operator_of(op), operator_of(op)->create(&create)};
    if (kernel->own == NULL) {
        free(kernel);
        return make_error(api, create.error);
    }
    *made = kernel;
    return NULL;
}

static void destroy(void *kernel)
{
    helpers_drain();
    free(((Kernel *)kernel)->own);
    free(kernel);
}

static void run_in(const Run *run, size_t tasks, size_t batches, void (*task)(void *, size_t), void *data)
{
    OrtStatus *status = ORT(run->api, KernelContext_ParallelFor)(run->context, task, tasks, batches, data);
    if (status != NULL) { /* the context has no thread pool */
        ORT(run->api, ReleaseStatus)(status);
        for (size_t i = 0; i < tasks; i++)
            task(data, i);
    }
}

static void run_tasks(void *pool, size_t tasks, void (*task)(void *, size_t), void *data)
{
    run_in(pool, tasks, tasks, task, data);
}

typedef struct {
    void (*task)(void *, size_t);
    void *data;
    size_t tasks, each; /* of a unit */
} Tasks;

static bool run_units(const void *data, size_t from, size_t end, void *results)
{
    const Tasks *tasks = data;
    (void)results;
    for (size_t i = from * tasks->each; i < end * tasks->each && i < tasks->tasks; i++)
        tasks->task(tasks->data, i);
    return true;
}

static void run_ranges(void *pool, size_t tasks, void (*task)(void *, size_t), void *data)
{
    const Run *run = pool;
    Tasks *all = helpers_begin(run->helpers, sizeof *all);
    if (all == NULL) {
        run_in(run, tasks, 0, task, data); /* 0: one batch per thread */
        return;
    }
    *all = (Tasks){task, data, tasks, (tasks + MOST_UNITS - 1) / MOST_UNITS};
    helpers_run(&(Job){.run = run_units, .data = all, .units = (tasks + all->each - 1) / all->each}, NULL);
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context)
{
    const Kernel *this_kernel = kernel;
    Run run = {this_kernel->api, context, NULL, this_kernel->operator->helpers, {&run, run_tasks}, {&run, run_ranges}};
    return this_kernel->operator->run(this_kernel->own, &run) ? NULL : make_error(this_kernel->api, run.error);
}

bool fail(Run *run, const char *error)
{
    run->error = error;
    return false;
}

/* Returns whether a call succeeded. Replaces its message by `error` if it failed. */
static bool check(Run *run, OrtStatus *status, const char *error)
{
    if (status == NULL)
        return true;
    ORT(run->api, ReleaseStatus)(status);
    return fail(run, error);
}

static bool describe(Run *run, const OrtValue *value, Tensor *tensor)
{
    static const char *unreadable = "satchel: a tensor cannot be read";
    const OrtApi *api = run->api;
    OrtTensorInfo *info;
    if (!check(run, ORT(api, GetTensorTypeAndShape)(value, &info), unreadable))
        return false;
    bool fits = check(run, ORT(api, GetTensorElementType)(info, &tensor->type), unreadable)
        && check(run, ORT(api, GetDimensionsCount)(info, &tensor->rank), unreadable)
        && (tensor->rank <= MAX_RANK || fail(run, "satchel: a tensor has too many dimensions"))
        && check(run, ORT(api, GetDimensions)(info, tensor->dims, tensor->rank), unreadable);
    ORT(api, ReleaseTensorTypeAndShapeInfo)(info);
    tensor->count = 1;
    for (size_t i = 0; fits && i < tensor->rank; i++)
        tensor->count *= tensor->dims[i];
    return fits;
}

bool input(Run *run, size_t index, OrtElementType type, Tensor *tensor)
{
    const OrtApi *api = run->api;
    const OrtValue *value = NULL;
    size_t count;
    memset(tensor, 0, sizeof *tensor);
    if (!check(run, ORT(api, KernelContext_GetInputCount)(run->context, &count), "satchel: inputs cannot be counted"))
        return false;
    if (index >= count)
        return true;
    if (!check(run, ORT(api, KernelContext_GetInput)(run->context, index, &value), "satchel: an input cannot be read"))
        return false;
    if (value == NULL)
        return true;
    if (!describe(run, value, tensor))
        return false;
    if (type != ORT_ANY && tensor->type != type)
        return fail(run, "satchel: an input has the wrong element type");
    return check(run, ORT(api, GetTensorMutableData)((OrtValue *)value, &tensor->data),
                 "satchel: an input has no data");
}

bool output_of_any_type(Run *run, size_t index, const int64_t *dims, size_t rank, void **data)
{
    const OrtApi *api = run->api;
    OrtValue *value = NULL;
    OrtStatus *status = ORT(api, KernelContext_GetOutput)(run->context, index, dims, rank, &value);
    if (!check(run, status, "satchel: the shape of an output differs from the bound buffer"))
        return false;
    if (value == NULL)
        return fail(run, "satchel: an output is missing");
    return check(run, ORT(api, GetTensorMutableData)(value, data), "satchel: an output has no data");
}

bool has_dims(const Tensor *tensor, size_t rank, const int64_t *dims)
{
    return tensor->rank == rank && memcmp(tensor->dims, dims, rank * sizeof *dims) == 0;
}

int64_t attribute(Create *create, const char *name, int64_t fallback)
{
    int64_t value;
    OrtStatus *status = ORT(create->api, KernelInfoGetAttribute_int64)(create->info, name, &value);
    if (status == NULL)
        return value;
    ORT(create->api, ReleaseStatus)(status);
    return fallback;
}

float attribute_float(Create *create, const char *name, float fallback)
{
    float value;
    OrtStatus *status = ORT(create->api, KernelInfoGetAttribute_float)(create->info, name, &value);
    if (status == NULL)
        return value;
    ORT(create->api, ReleaseStatus)(status);
    return fallback;
}

bool is_constant(Create *create, size_t index)
{
    int constant = 0;
    const OrtValue *value;
    OrtStatus *status = ORT(create->api, KernelInfoGetConstantInput_tensor)(create->info, index, &constant, &value);
    if (status == NULL)
        return constant != 0;
    ORT(create->api, ReleaseStatus)(status);
    return false;
}

bool attribute_text(Create *create, const char *name, char *text, size_t size)
{
    size_t length = 0; /* queried first; includes the terminating zero */
    OrtStatus *status = ORT(create->api, KernelInfoGetAttribute_string)(create->info, name, NULL, &length);
    text[0] = 0;
    if (status != NULL) {
        ORT(create->api, ReleaseStatus)(status);
        return true;
    }
    if (length > size)
        return false;
    status = ORT(create->api, KernelInfoGetAttribute_string)(create->info, name, text, &length);
    if (status == NULL)
        return true;
    ORT(create->api, ReleaseStatus)(status);
    return false;
}

static OrtStatus *add(const OrtApi *api, OrtCustomOpDomain *domain, Operator *operator)
{
    operator->op = (OrtCustomOp){
        .version = ORT_API_VERSION,
        .get_name = get_name,
        .get_provider = get_provider,
        .get_input_type = get_input_type,
        .get_input_count = get_input_count,
        .get_output_type = get_output_type,
        .get_output_count = get_output_count,
        .destroy = destroy,
        .get_input_characteristic = get_input_characteristic,
        .get_output_characteristic = get_output_characteristic,
        .get_input_memory = get_input_memory,
        .create_kernel_checked = create_kernel,
        .compute_checked = compute,
        .get_start_version = get_start_version,
        .get_end_version = get_end_version,
    };
    return ORT(api, CustomOpDomain_Add)(domain, &operator->op);
}

#ifdef _WIN32
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

/* For satchel's runner: see instruction_set.h and trial.h, before the first session, and helpers.h, before it ends one. */
EXPORTED const char *satchel_announced_instruction_set(size_t index) { return announced_instruction_set(index); }
EXPORTED const char *satchel_choose_instruction_set(const char *name) { return choose_instruction_set(name); }
EXPORTED bool satchel_try_instruction_set(const char *name) { return try_instruction_set(name); }
EXPORTED void satchel_drain_helpers(void) { helpers_drain(); }

/* For satchel's exporter, which has chosen an instruction set before: see rounding.h. */
EXPORTED void satchel_choose_scales(const ScalesCall *call) { instructions->choose_scales(call); }
EXPORTED void satchel_round_inputs(const InputsCall *call) { instructions->round_inputs(call); }
EXPORTED void satchel_descend_inputs(const InputsCall *call) { instructions->descend_inputs(call); }

/* The threads that satchel's runner gives a session, less its own; 0 if it has not said. */
static size_t helpers_of(const OrtApi *api, const OrtSessionOptions *options)
{
    char text[16];
    size_t size = sizeof text;
    OrtStatus *status = ORT(api, GetSessionConfigEntry)(options, "satchel.helpers", text, &size);
    if (status == NULL)
        return strtoul(text, NULL, 10);
    ORT(api, ReleaseStatus)(status);
    return 0;
}

/* The domain of operators for sessions with as many helpers. It lives as long as the process. */
static OrtStatus *domain_for(const OrtApi *api, size_t helpers, OrtCustomOpDomain **domain)
{
    static OrtCustomOpDomain *domains[1 + MOST_HELPERS];
    const Operator *const each[] = {&linear_operator,         &table_linear_operator,   &attention_operator,
                              &attention_half_operator, &attention_int8_operator, &recurrence_operator,
                              &convolution_operator,    &positions_operator,      &last_token_operator,
                              &all_reduce_operator,     &all_gather_operator,     &gather_logits_operator,
                              &rounded_gather_operator, &send_operator,           &receive_operator};
    enum { OPERATORS = sizeof each / sizeof *each };
    if (domains[helpers] == NULL) {
        OrtCustomOpDomain *made;
        Operator *operators = malloc(OPERATORS * sizeof *operators);
        OrtStatus *status = operators == NULL ? make_error(api, "satchel: out of memory")
                                              : ORT(api, CreateCustomOpDomain)("satchel", &made);
        for (size_t i = 0; status == NULL && i < OPERATORS; i++) {
            operators[i] = *each[i];
            operators[i].helpers = helpers;
            status = add(api, made, operators + i);
        }
        if (status != NULL)
            return status;
        domains[helpers] = made;
    }
    *domain = domains[helpers];
    return NULL;
}

/* The entry point that ONNX Runtime calls in a custom operator library. */
EXPORTED OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base)
{
    static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
    const OrtApi *api = base->get_api(ORT_API_VERSION);
    if (api == NULL) { /* an older ONNX Runtime: report it through the first version of the interface */
        const OrtApi *oldest = base->get_api(1);
        return oldest == NULL ? NULL
                              : make_error(oldest, "satchel: this ONNX Runtime is too old for satchel's kernels");
    }
    if (instructions == NULL && choose_instruction_set(NULL) == NULL)
        return make_error(api, "satchel: this processor has none of the instruction sets of satchel's kernels");
    const size_t helpers = helpers_of(api, options);
    OrtCustomOpDomain *domain;
    pthread_mutex_lock(&making);
    OrtStatus *status = domain_for(api, helpers <= MOST_HELPERS ? helpers : 0, &domain);
    pthread_mutex_unlock(&making);
    return status == NULL ? ORT(api, AddCustomOpDomain)(options, domain) : status;
}

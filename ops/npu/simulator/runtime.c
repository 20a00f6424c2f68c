/* What torch-npu asks of the Ascend runtime and must get an answer to: memory, streams, capture, communicators.
 *
 * Device memory is host memory, so copies are true; no kernel computes anything. Every function returns 0, success,
 * unless it says otherwise. Parameters that play no part are left out: the C calling convention lets a callee ignore
 * what stands in later registers, and only leading parameters that are not needed are written down.
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OUT_OF_MEMORY = 207001, TRACE_LIMIT = 1 << 16 };

/* --- what ran, in order: aclnn ops and captured graphs, read from Python --- */

static const char *trace[TRACE_LIMIT];
static int traced;
static pthread_mutex_t trace_lock = PTHREAD_MUTEX_INITIALIZER;

void npu_simulator_record(const char *name) {
    pthread_mutex_lock(&trace_lock);
    if (traced < TRACE_LIMIT) trace[traced++] = name;
    pthread_mutex_unlock(&trace_lock);
}
void npu_simulator_clear(void) { traced = 0; }
const char *npu_simulator_trace(int index) { return index < traced ? trace[index] : NULL; }

/* --- handles: streams, events, descriptors are opaque to torch-npu --- */

void *npu_simulator_handle(void) { return calloc(1, 64); }
static int new_handle(void **handle) { return (*handle = npu_simulator_handle()) ? 0 : OUT_OF_MEMORY; }

int aclrtCreateStream(void **stream) { return new_handle(stream); }
int aclrtCreateStreamWithConfig(void **stream) { return new_handle(stream); }
int aclrtCreateEvent(void **event) { return new_handle(event); }
int aclrtCreateEventWithFlag(void **event) { return new_handle(event); }
int aclrtCreateEventExWithFlag(void **event) { return new_handle(event); }
void *aclCreateTensorDesc(void) { return npu_simulator_handle(); }
void *aclCreateDataBuffer(void) { return npu_simulator_handle(); }
void *aclopCreateAttr(void) { return npu_simulator_handle(); }

/* Whatever was launched has finished. */
enum { COMPLETE = 1 };
int aclrtQueryEventStatus(void *event, int *status) { *status = COMPLETE; return 0; }
int aclrtQueryEventWaitStatus(void *event, int *status) { *status = COMPLETE; return 0; }
int aclrtStreamQuery(void *stream, int *status) { *status = COMPLETE; return 0; }
int aclrtEventElapsedTime(float *milliseconds) { *milliseconds = 0; return 0; }

/* --- one device --- */

static __thread int32_t current_device;

int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return 0; }
const char *aclrtGetSocName(void) { return "Ascend910_9391"; } /* an Atlas A3 */
int aclrtSetDevice(int32_t device) { current_device = device; return 0; }
int aclrtGetDevice(int32_t *device) { *device = current_device; return 0; }
int aclrtGetCurrentContext(void **context) { *context = &current_device; return 0; }
int aclrtDeviceCanAccessPeer(int32_t *can) { *can = 1; return 0; }
int aclrtDeviceGetBareTgid(int32_t *pid) { *pid = getpid(); return 0; }
int aclrtGetDeviceSatMode(int *mode) { *mode = 1; return 0; }
int aclrtGetStreamResLimit(void *stream, int kind, uint32_t *cores) { *cores = 24; return 0; }
const char *aclGetRecentErrMsg(void) { return ""; }
size_t aclGetCompileoptSize(void) { return 64; }
int aclGetCompileopt(int option, char *value, size_t size) { if (size) value[0] = 0; return 0; }

static int64_t options[64];
int aclrtGetSysParamOpt(unsigned option, int64_t *value) { *value = options[option % 64]; return 0; }
int aclrtSetSysParamOpt(unsigned option, int64_t value) { options[option % 64] = value; return 0; }
int aclrtCtxGetSysParamOpt(unsigned option, int64_t *value) { *value = options[option % 64]; return 0; }
int aclrtCtxSetSysParamOpt(unsigned option, int64_t value) { options[option % 64] = value; return 0; }

/* --- memory --- */

/* Pages of zeros that take memory once they are written, so that a model of any size has room. The size stands in a
   page of its own before them. */
enum { PAGE = 4096 };
static int allocate(void **pointer, size_t bytes) {
    size_t whole = bytes + PAGE;
    char *start = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return OUT_OF_MEMORY;
    *(size_t *)start = whole;
    *pointer = start + PAGE;
    return 0;
}
static int release(void *pointer) {
    if (pointer) munmap((char *)pointer - PAGE, *(size_t *)((char *)pointer - PAGE));
    return 0;
}
int aclrtMalloc(void **pointer, size_t bytes) { return allocate(pointer, bytes); }
int aclrtMallocAlign32(void **pointer, size_t bytes) { return allocate(pointer, bytes); }
int aclrtMallocHost(void **pointer, size_t bytes) { return allocate(pointer, bytes); }
int aclrtMallocHostWithCfg(void **pointer, size_t bytes) { return allocate(pointer, bytes); }
int aclrtFree(void *pointer) { return release(pointer); }
int aclrtFreeHost(void *pointer) { return release(pointer); }
int aclrtGetMemInfo(int kind, size_t *available, size_t *total) {
    *total = (size_t)64 << 40; /* more than any model, of which nothing is written */
    *available = *total - ((size_t)4 << 30);
    return 0;
}
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes) { memmove(to, from, bytes); return 0; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes) { memmove(to, from, bytes); return 0; }
int aclrtMemset(void *to, size_t room, int value, size_t bytes) { memset(to, value, bytes); return 0; }
int aclrtMemsetAsync(void *to, size_t room, int value, size_t bytes) { memset(to, value, bytes); return 0; }

/* --- capture and replay of graphs --- */

static char captured_model;
static int capturing;
int aclmdlRICaptureBegin(void) { capturing = 1; npu_simulator_record("capture begin"); return 0; }
int aclmdlRICaptureEnd(void *stream, void **model) {
    capturing = 0;
    *model = &captured_model;
    npu_simulator_record("capture end");
    return 0;
}
int aclmdlRICaptureGetInfo(void *stream, int *status, void **model) {
    *status = capturing;
    *model = &captured_model;
    return 0;
}
int aclmdlRIExecuteAsync(void) { npu_simulator_record("replay"); return 0; }
/* A group of captured tasks whose parameters are set anew before a replay. */
int aclmdlRICaptureTaskGrpBegin(void) { npu_simulator_record("task group begin"); return 0; }
int aclmdlRICaptureTaskGrpEnd(void *stream, void **group) {
    npu_simulator_record("task group end");
    return new_handle(group);
}
int aclmdlRICaptureTaskUpdateBegin(void) { npu_simulator_record("task update begin"); return 0; }
int aclmdlRICaptureTaskUpdateEnd(void) { npu_simulator_record("task update end"); return 0; }

/* --- communicators, which have names; collectives move nothing --- */

enum { COMMUNICATOR_BYTES = 4096, NAME_BYTES = 64, ROOT_INFO_BYTES = 128 };
static int communicators;
static int new_communicator(void **communicator) {
    if (!(*communicator = calloc(1, COMMUNICATOR_BYTES))) return OUT_OF_MEMORY;
    snprintf(*communicator, NAME_BYTES, "simulated_communicator_%d", communicators++);
    return 0;
}
int HcclGetRootInfo(void *information) { memset(information, 1, ROOT_INFO_BYTES); return 0; }
int HcclCommInitRootInfo(uint32_t ranks, const void *root, uint32_t rank, void **out) { return new_communicator(out); }
int HcclCommInitRootInfoConfig(uint32_t ranks, const void *root, uint32_t rank, const void *config, void **out) {
    return new_communicator(out);
}
int HcclCreateSubCommConfig(void *parent, uint32_t ranks, void *ids, uint64_t id, uint32_t rank, void *config, void **out) {
    return new_communicator(out);
}
int HcclGetCommName(void *communicator, char *name) { strcpy(name, communicator); return 0; }
int HcclGetCommAsyncError(void *communicator, int *error) { *error = 0; return 0; }
uint32_t HcclGetCommConfigCapability(void) { return 0xffff; }

/* --- the safe string functions of CANN's C library --- */

int vsnprintf_s(char *to, size_t room, size_t count, const char *format, va_list arguments) {
    return vsnprintf(to, room, format, arguments);
}
int snprintf_s(char *to, size_t room, size_t count, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int written = vsnprintf(to, room, format, arguments);
    va_end(arguments);
    return written;
}
int strcpy_s(char *to, size_t room, const char *from) { return snprintf(to, room, "%s", from) < 0; }

/* --- the graph engine's C++ functions that return objects: the caller passes where the object goes --- */

void *_ZN2ge13GEGetErrorMsgEv(void **text) { /* std::string GEGetErrorMsg(): an empty one, stored inside itself */
    text[0] = &text[2];
    text[1] = NULL;
    ((char *)&text[2])[0] = 0;
    return text;
}
void *_ZN2ge15GEGetWarningMsgV2Ev(void *text) { /* AscendString GEGetWarningMsgV2(): an empty shared pointer */
    memset(text, 0, 2 * sizeof(void *));
    return text;
}
const char *_ZNK2ge12AscendString9GetStringEv(void ***text) { return *text ? (const char *)*text : ""; }
